"""A stream of documents, kept in step with the collection: what is there, what is to be done, and the doing of it."""
