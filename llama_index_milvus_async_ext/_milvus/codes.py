"""The numbers that Milvus answers refused requests with, in one table."""

from __future__ import annotations

from typing import NamedTuple

from llama_index_milvus_async_ext.retry import Verdict

COLLECTION_NOT_FOUND = 100
COLLECTION_NOT_LOADED = 101
NOT_READY = 1
SCHEMA_MISMATCH = 109
PARAMETER_INVALID = 1100
UNEXPECTED = 65535
OLD_ILLEGAL_ARGUMENT = 5
OLD_SCHEMA_MISMATCH = 62


class Code(NamedTuple):
    """One of Milvus's error codes, and what it says about the request that met it."""

    code: int
    name: str
    verdict: Verdict


# What Milvus answers requests with: pkg/util/merr/errors.go of milvus 2.3 to 2.6 (those of data definition, imports,
# compaction and the REST interface, which no request of ours meets, are left out), and milvus_lite's
# adapter/grpc/errors.py. A write may have been executed where the verdict is AMBIGUOUS, in part at least, as each
# shard takes its rows by itself; with every other verdict it certainly was not. A code that is not here is AMBIGUOUS.
CODES = (
    Code(2, "service unavailable", Verdict.AMBIGUOUS),
    Code(3, "memory limit exceeded", Verdict.OVERLOAD),
    Code(4, "too many requests", Verdict.OVERLOAD),
    Code(5, "service internal error", Verdict.AMBIGUOUS),
    # Milvus Lite's number for what it can't read; a server's "cross cluster routing", which no request of ours meets.
    Code(6, "illegal argument", Verdict.BAD_DATA),
    Code(7, "disk limit exceeded", Verdict.FULL),
    Code(8, "rate limit exceeded", Verdict.OVERLOAD),
    Code(9, "quota exceeded", Verdict.OVERLOAD),
    Code(10, "unimplemented", Verdict.PERMANENT),
    Code(11, "time tick long delay", Verdict.OVERLOAD),
    Code(12, "resource insufficient", Verdict.AMBIGUOUS),
    Code(26, "index build failed (Lite)", Verdict.PERMANENT),
    Code(35, "index already exists (Lite)", Verdict.PERMANENT),
    Code(COLLECTION_NOT_FOUND, "collection not found", Verdict.PERMANENT),
    Code(COLLECTION_NOT_LOADED, "collection not loaded", Verdict.TRANSIENT),
    Code(102, "too many collections", Verdict.PERMANENT),
    Code(103, "collection not fully loaded", Verdict.TRANSIENT),
    Code(104, "collection already loaded", Verdict.PERMANENT),
    Code(105, "illegal collection schema", Verdict.PERMANENT),
    Code(106, "collection on recovering", Verdict.TRANSIENT),
    Code(107, "vector clustering key not allowed", Verdict.PERMANENT),
    Code(108, "collection under standby mode", Verdict.PERMANENT),
    # Checked before a write, and again by each shard.
    Code(SCHEMA_MISMATCH, "collection schema mismatch", Verdict.AMBIGUOUS),
    Code(110, "collection schema version not ready", Verdict.AMBIGUOUS),
    Code(200, "partition not found", Verdict.PERMANENT),
    Code(201, "partition not loaded", Verdict.TRANSIENT),
    Code(202, "partition not fully loaded", Verdict.TRANSIENT),
    Code(250, "general capacity exceeded", Verdict.PERMANENT),
    Code(400, "replica not found", Verdict.AMBIGUOUS),
    Code(401, "replica not available", Verdict.AMBIGUOUS),
    Code(500, "channel not found", Verdict.AMBIGUOUS),
    Code(501, "channel lacks", Verdict.AMBIGUOUS),
    Code(502, "channel reduplicates", Verdict.AMBIGUOUS),
    Code(503, "channel not available", Verdict.AMBIGUOUS),
    Code(504, "channel checkpoint exceeds max lag", Verdict.AMBIGUOUS),
    Code(505, "channel tsafe stalled", Verdict.AMBIGUOUS),
    Code(507, "channel misrouted", Verdict.AMBIGUOUS),
    Code(600, "segment not found", Verdict.AMBIGUOUS),
    Code(601, "segment not loaded", Verdict.AMBIGUOUS),
    Code(602, "segment lacks", Verdict.AMBIGUOUS),
    Code(603, "segment reduplicates", Verdict.AMBIGUOUS),
    Code(604, "segment load failed", Verdict.AMBIGUOUS),
    Code(605, "segment request resource failed", Verdict.AMBIGUOUS),
    Code(700, "index not found", Verdict.PERMANENT),
    Code(701, "index type not supported", Verdict.PERMANENT),
    Code(702, "index duplicates", Verdict.PERMANENT),
    Code(800, "database not found", Verdict.PERMANENT),
    Code(801, "too many databases", Verdict.PERMANENT),
    Code(802, "invalid database name", Verdict.PERMANENT),
    Code(901, "node not found", Verdict.AMBIGUOUS),
    Code(902, "node offline", Verdict.AMBIGUOUS),
    Code(903, "node lacks", Verdict.AMBIGUOUS),
    Code(904, "node not match", Verdict.AMBIGUOUS),
    Code(905, "node not available", Verdict.AMBIGUOUS),
    Code(906, "node state unexpected", Verdict.AMBIGUOUS),
    Code(1000, "key not found", Verdict.AMBIGUOUS),
    Code(1001, "I/O failed", Verdict.AMBIGUOUS),
    Code(1002, "unexpected end of file", Verdict.AMBIGUOUS),
    Code(1003, "too many requests to storage", Verdict.AMBIGUOUS),
    Code(1008, "storage internal error", Verdict.AMBIGUOUS),
    Code(PARAMETER_INVALID, "invalid parameter", Verdict.BAD_DATA),
    Code(1101, "missing parameter", Verdict.BAD_DATA),
    Code(1102, "parameter too large", Verdict.TOO_LARGE),
    Code(1200, "metric not found", Verdict.PERMANENT),
    Code(1300, "topic not found", Verdict.AMBIGUOUS),
    Code(1301, "topic not empty", Verdict.AMBIGUOUS),
    Code(1302, "message queue internal error", Verdict.AMBIGUOUS),
    Code(1303, "writing to the message queue denied", Verdict.PERMANENT),
    Code(1400, "not authenticated", Verdict.PERMANENT),
    Code(1401, "privilege not permitted", Verdict.PERMANENT),
    Code(1600, "alias not found", Verdict.PERMANENT),
    Code(1603, "collection id of alias not found", Verdict.PERMANENT),
    Code(1700, "field not found", Verdict.BAD_DATA),
    Code(1701, "field name invalid", Verdict.BAD_DATA),
    # What the engine says of a search: of its filter, its parameters, its vector.
    Code(2000, "segcore error", Verdict.BAD_DATA),
    Code(2001, "segcore unsupported", Verdict.BAD_DATA),
    Code(2037, "segcore folly exception", Verdict.AMBIGUOUS),
    Code(2038, "segcore future cancelled", Verdict.AMBIGUOUS),
    Code(2099, "knowhere error", Verdict.BAD_DATA),
    Code(2200, "inconsistent requery result", Verdict.AMBIGUOUS),
    Code(3000, "unsupported operation", Verdict.PERMANENT),
    Code(10000, "cancelled", Verdict.AMBIGUOUS),
    Code(10001, "timed out", Verdict.AMBIGUOUS),
    Code(UNEXPECTED, "unexpected error", Verdict.BAD_DATA),  # measured: a row that does not fit, a filter, a vector
)
BY_CODE = {each.code: each.verdict for each in CODES}

# The numbers before 2.3 (common.proto), which Milvus still sends beside the others, or alone. They count where the
# newer one says nothing.
BY_OLD_CODE = {
    3: Verdict.PERMANENT,  # permission denied
    4: Verdict.PERMANENT,  # collection not exists
    OLD_ILLEGAL_ARGUMENT: Verdict.BAD_DATA,
    45: Verdict.AMBIGUOUS,  # not shard leader
    46: Verdict.AMBIGUOUS,  # no replica available
    47: Verdict.AMBIGUOUS,  # segment not found
    48: Verdict.OVERLOAD,  # force deny
    49: Verdict.OVERLOAD,  # rate limit
    50: Verdict.AMBIGUOUS,  # node id not match
    51: Verdict.PERMANENT,  # upsert into a collection that makes up its own keys
    52: Verdict.OVERLOAD,  # insufficient memory
    53: Verdict.OVERLOAD,  # memory quota
    54: Verdict.FULL,  # disk quota
    55: Verdict.OVERLOAD,  # time tick long delay
    56: Verdict.TRANSIENT,  # not ready to serve
    57: Verdict.TRANSIENT,  # coordinator activating
    OLD_SCHEMA_MISMATCH: Verdict.AMBIGUOUS,
    100: Verdict.AMBIGUOUS,  # data coordinator not available
}
SAYS_NOTHING = frozenset({0, NOT_READY, UNEXPECTED})
