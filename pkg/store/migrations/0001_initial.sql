-- One row: which history this is, and the counters that order it.
CREATE TABLE state (
    id              INTEGER NOT NULL PRIMARY KEY CHECK (id = 1),
    epoch           TEXT    NOT NULL,
    revision        INTEGER NOT NULL CHECK (revision >= 0),
    bundle_sequence INTEGER NOT NULL CHECK (bundle_sequence >= 0)
) STRICT;

CREATE TABLE entries (
    name     TEXT    NOT NULL PRIMARY KEY,
    -- The entry in the JSON form of entry.v1.Entry.
    entry    TEXT    NOT NULL,
    revision INTEGER NOT NULL
) STRICT;

CREATE TABLE nodes (
    id             TEXT    NOT NULL PRIMARY KEY,
    state          TEXT    NOT NULL CHECK (state IN ('active', 'evicted', 'banned')),
    state_reason   TEXT    NOT NULL,
    -- The attested facts in the JSON form of attributes.v1.Node.
    attributes     TEXT    NOT NULL,
    attested_at    INTEGER NOT NULL,
    serial         BLOB    NOT NULL,
    not_after      INTEGER NOT NULL,
    confirmed      INTEGER NOT NULL CHECK (confirmed IN (0, 1)),
    previous       BLOB    NOT NULL,
    previous_until INTEGER NOT NULL,
    agent_version  TEXT    NOT NULL,
    address        TEXT    NOT NULL,
    last_seen      INTEGER NOT NULL
) STRICT;

CREATE TABLE join_tokens (
    sha256     BLOB    NOT NULL PRIMARY KEY CHECK (length(sha256) = 32),
    node_name  TEXT    NOT NULL,
    labels     TEXT    NOT NULL,
    created_by TEXT    NOT NULL,
    created_at INTEGER NOT NULL,
    expires_at INTEGER NOT NULL,
    -- 0 until the token is used.
    used_at    INTEGER NOT NULL
) STRICT;

CREATE INDEX join_tokens_expires_at ON join_tokens (expires_at);

CREATE TABLE roots (
    id          INTEGER NOT NULL PRIMARY KEY,
    certificate BLOB    NOT NULL UNIQUE,
    key_ref     TEXT    NOT NULL,
    state       TEXT    NOT NULL,
    created_at  INTEGER NOT NULL
) STRICT;
