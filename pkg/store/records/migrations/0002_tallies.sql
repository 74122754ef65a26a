-- How many decisions there were, so that the answer costs the same however many
-- records there are. What was archived stays in here, for some weeks.

-- minute counts from 1970. outcome is that of the records; reason is a name, or 0.
-- A record that stands for several refusals counts for all of them.
CREATE TABLE tallies (
    minute  INTEGER NOT NULL,
    event   INTEGER NOT NULL,
    outcome INTEGER NOT NULL,
    reason  INTEGER NOT NULL,
    total   INTEGER NOT NULL,
    PRIMARY KEY (minute, event, outcome, reason)
) STRICT, WITHOUT ROWID;

-- The same of issuance for each entry. hour counts from 1970; last is the time of
-- the newest record.
CREATE TABLE entry_tallies (
    hour    INTEGER NOT NULL,
    entry   INTEGER NOT NULL,
    outcome INTEGER NOT NULL,
    total   INTEGER NOT NULL,
    last    INTEGER NOT NULL,
    PRIMARY KEY (hour, entry, outcome)
) STRICT, WITHOUT ROWID;

-- Records that were taken before these tables were there count one each.
INSERT INTO tallies (minute, event, outcome, reason, total)
    SELECT time / 60000000000, event, COALESCE(failure, 1), COALESCE(reason, 0), count(*) FROM records GROUP BY 1, 2, 3, 4;
INSERT INTO entry_tallies (hour, entry, outcome, total, last)
    SELECT time / 3600000000000, entry, COALESCE(failure, 1), count(*), max(time) FROM records
    WHERE event = 1 AND entry IS NOT NULL GROUP BY 1, 2, 3;
