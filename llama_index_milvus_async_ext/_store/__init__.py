"""What the store, the writer and the retriever are asked for, carried out."""
