-- The ledger, by its journal's random name, that has the records of what is decided by
-- this database: one, as long as one CA uses it.
CREATE TABLE ledgers (
    journal TEXT NOT NULL PRIMARY KEY
) STRICT;
