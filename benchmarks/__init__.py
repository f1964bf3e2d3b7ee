"""Benchmarks of llama-index-milvus-async-ext, against upstream's store and against what the server can take.

Run them with `python -m benchmarks`. The workloads are in `adds`, `bulk`, `searches`, `latency`, `lite`, `embedding`,
`memory` and `sizes`, those of ingestion in `ingestion` and the modules named after it; `ready_made` sends the requests
that mark the server's ceiling, `backend` opens stores and checks what they stored, `corpus` makes the nodes, `measure`
takes times, `report` and `charts` show the results. `sweep` chooses the store's defaults, and `profile_paths` shows
where the time goes.
"""
