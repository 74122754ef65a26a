-- Tokens of others that admitted a node and must not do so again, until they expire.
CREATE TABLE used_tokens (
    sha256     BLOB    NOT NULL PRIMARY KEY,
    expires_at INTEGER NOT NULL
) STRICT;
CREATE INDEX used_tokens_expires_at ON used_tokens (expires_at);
