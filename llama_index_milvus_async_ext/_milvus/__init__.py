"""The only room that knows pymilvus, gRPC and Milvus Lite."""
