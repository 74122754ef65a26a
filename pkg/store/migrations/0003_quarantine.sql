-- What is refused: one of an identity, a key and a certificate; the others are empty.
CREATE TABLE quarantines (
    spiffe_id  TEXT    NOT NULL,
    key_sha256 BLOB    NOT NULL,
    serial     BLOB    NOT NULL,
    reason     TEXT    NOT NULL,
    created_by TEXT    NOT NULL,
    created_at INTEGER NOT NULL,
    PRIMARY KEY (spiffe_id, key_sha256, serial)
) STRICT;
