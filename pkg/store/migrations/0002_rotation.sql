-- The trust bundle's roots change one step at a time: whoever changes them names
-- the epoch that he has read.
ALTER TABLE state ADD COLUMN trust_epoch INTEGER NOT NULL DEFAULT 0 CHECK (trust_epoch >= 0);
ALTER TABLE state ADD COLUMN trust_paused INTEGER NOT NULL DEFAULT 0 CHECK (trust_paused IN (0, 1));

ALTER TABLE roots ADD COLUMN since INTEGER NOT NULL DEFAULT 0;
-- Sequence of the first bundle that held it.
ALTER TABLE roots ADD COLUMN sequence INTEGER NOT NULL DEFAULT 1 CHECK (sequence >= 0);
ALTER TABLE roots ADD COLUMN automatic INTEGER NOT NULL DEFAULT 0 CHECK (automatic IN (0, 1));
ALTER TABLE roots ADD COLUMN tainted INTEGER NOT NULL DEFAULT 0 CHECK (tainted IN (0, 1));

-- Until when something lives that chains to a root: nothing that an intermediate
-- has signed, or will, lives beyond live_until.
CREATE TABLE intermediates (
    id         TEXT    NOT NULL PRIMARY KEY,
    root       TEXT    NOT NULL,
    instance   TEXT    NOT NULL,
    live_until INTEGER NOT NULL
) STRICT;
