"""How large requests are and how many of them, where the user does not say; and what that was measured by."""

from __future__ import annotations

from llama_index_milvus_async_ext._lane.lanes import GivesWay

# Rows that are not spread over several requests. 1,000 rows at once took a server 81 ms in requests of 500, 89 ms in
# requests of 250, and 114 ms in one.
LEAST_ROWS = 500
# Rows under way in full requests. gRPC holds two copies of them: with 8,000, a write of 100,000 rows of 768 dimensions
# took 120 MB. Six requests of 800 were as fast as eight of 1,000 (10,000 rows in 801 and 789 ms, medians of nine
# rounds; four of 1,000: 871 ms).
MOST_ROWS_UNDER_WAY = 5_000
# Queries that are not spread: 1,000 at once took a server 503 ms (Strong) and 288 ms (Bounded) in requests of 250, 524
# and 300 ms in requests of 500. Not on Milvus Lite, which takes as long for a request of one query as of hundreds.
LEAST_QUERIES = 250
# Hits that one search request may ask for: with 4 kB each, two thirds of what a server may answer at once (64 MiB).
# A larger answer would cost the server its work and then be halved.
MAX_HITS = 10_000
# Writes while somebody searches. One search after another beside a write of 100,000 rows (two cores, server included):
# 11 ms (median) beside one request of 100 rows at a time, 18 ms beside two, 15 ms beside one of 200, 50 ms beside one
# of 800, 145 ms beside six; idle, 4 ms. The write was a tenth to a fifth slower so than in six of 800.
BESIDE_SEARCHES = GivesWay(requests=1, items=200)
LEAST_CAPACITY = 64  # items that one entrance takes in before they are sent
