"""From a query to a request that others may share, and to its result."""
