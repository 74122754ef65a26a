-- The revocation lists of intermediates, DER, if the CA revokes by lists; and whether
-- they are part of the trust bundle.
CREATE TABLE revocation_lists (
    issuer BLOB NOT NULL PRIMARY KEY,
    list   BLOB NOT NULL
) STRICT;
ALTER TABLE state ADD COLUMN lists_in_force INTEGER NOT NULL DEFAULT 0 CHECK (lists_in_force IN (0, 1));
