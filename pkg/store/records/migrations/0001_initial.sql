-- The projection of one journal: what is needed to find records, which are read
-- from the journal itself. Nothing here is lost with the file: it is made again.

-- One row: the records below next are in the tables. Those below live_from were
-- there before these tables were, and raise no alarm. hash is the last record's.
CREATE TABLE cursor (
    id        INTEGER NOT NULL PRIMARY KEY CHECK (id = 1),
    next      INTEGER NOT NULL CHECK (next >= 0),
    live_from INTEGER NOT NULL CHECK (live_from >= 0),
    segment   INTEGER NOT NULL,
    position  INTEGER NOT NULL,
    hash      BLOB    NOT NULL
) STRICT;

-- Names that many records share, by a number. kind: see nameKind.
CREATE TABLE names (
    id   INTEGER NOT NULL PRIMARY KEY,
    kind INTEGER NOT NULL,
    name TEXT    NOT NULL,
    UNIQUE (kind, name)
) STRICT;

-- One row a record. What is absent is NULL, so that the indexes hold only what
-- is there. failure is the outcome, if that is not success.
CREATE TABLE records (
    idx        INTEGER NOT NULL PRIMARY KEY,
    segment    INTEGER NOT NULL,
    position   INTEGER NOT NULL,
    time       INTEGER NOT NULL,
    event      INTEGER NOT NULL,
    failure    INTEGER,
    reason     INTEGER,
    identity   INTEGER,
    node       INTEGER,
    entry      INTEGER,
    revision   INTEGER NOT NULL,
    authority  INTEGER,
    actor      INTEGER,
    request_id TEXT,
    anomalies  INTEGER
) STRICT;

CREATE INDEX records_time      ON records (time);
CREATE INDEX records_event     ON records (event, time);
CREATE INDEX records_identity  ON records (identity, time)  WHERE identity IS NOT NULL;
CREATE INDEX records_node      ON records (node, time)      WHERE node IS NOT NULL;
CREATE INDEX records_entry     ON records (entry, time, idx, revision) WHERE entry IS NOT NULL;
CREATE INDEX records_authority ON records (authority, time) WHERE authority IS NOT NULL;
CREATE INDEX records_reason    ON records (reason, time)    WHERE reason IS NOT NULL;
CREATE INDEX records_failure   ON records (failure, time)   WHERE failure IS NOT NULL;
CREATE INDEX records_actor     ON records (actor, time)     WHERE actor IS NOT NULL;
CREATE INDEX records_request   ON records (request_id)      WHERE request_id IS NOT NULL;
CREATE INDEX records_anomalies ON records (time)            WHERE anomalies IS NOT NULL;

-- The changes of entries: a handful of records among very many of issuance.
CREATE TABLE entry_changes (
    record   INTEGER NOT NULL PRIMARY KEY,
    entry    INTEGER NOT NULL,
    revision INTEGER NOT NULL
) STRICT;

CREATE INDEX entry_changes_entry ON entry_changes (entry, record);

-- The inventory: one row an X.509-SVID that was issued. state: see holderState.
-- overdue_at is when it should have been replaced at the latest; NULL once it is
-- no longer in use.
CREATE TABLE certificates (
    record       INTEGER NOT NULL PRIMARY KEY,
    serial       BLOB    NOT NULL,
    sha256       BLOB    NOT NULL,
    spki_sha256  BLOB    NOT NULL,
    identity     INTEGER,
    node         INTEGER,
    entry        INTEGER,
    authority    INTEGER,
    instance     TEXT    NOT NULL,
    image_digest TEXT    NOT NULL,
    not_before   INTEGER NOT NULL,
    not_after    INTEGER NOT NULL,
    state        INTEGER NOT NULL,
    state_at     INTEGER NOT NULL,
    replaced_by  INTEGER,
    overdue_at   INTEGER
) STRICT;

CREATE INDEX certificates_serial    ON certificates (serial);
CREATE INDEX certificates_sha256    ON certificates (sha256);
CREATE INDEX certificates_spki      ON certificates (spki_sha256);
CREATE INDEX certificates_identity  ON certificates (identity, not_after);
CREATE INDEX certificates_node      ON certificates (node, not_after);
CREATE INDEX certificates_entry     ON certificates (entry, not_after) WHERE entry IS NOT NULL;
CREATE INDEX certificates_authority ON certificates (authority, not_after);
CREATE INDEX certificates_state     ON certificates (state, not_after);
CREATE INDEX certificates_overdue   ON certificates (overdue_at) WHERE overdue_at IS NOT NULL;
CREATE INDEX certificates_current   ON certificates (node, instance) WHERE overdue_at IS NOT NULL;

-- The first record of each identity on each node. It outlives the records.
CREATE TABLE sightings (
    identity INTEGER NOT NULL,
    node     INTEGER NOT NULL,
    record   INTEGER NOT NULL,
    time     INTEGER NOT NULL,
    -- 1 if the identity had never been seen before, on any node.
    fresh    INTEGER NOT NULL CHECK (fresh IN (0, 1)),
    PRIMARY KEY (identity, node)
) STRICT;

CREATE INDEX sightings_time ON sightings (time);

-- How many identities were ever seen on each node.
CREATE TABLE fan_out (
    node       INTEGER NOT NULL PRIMARY KEY,
    identities INTEGER NOT NULL
) STRICT;

CREATE INDEX fan_out_identities ON fan_out (identities);

-- How many records each rule has marked, from live_from on.
CREATE TABLE anomaly_counts (
    rule  INTEGER NOT NULL PRIMARY KEY,
    total INTEGER NOT NULL
) STRICT;
