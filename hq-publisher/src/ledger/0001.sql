CREATE TABLE fact (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE change (n BIGINT NOT NULL);
INSERT INTO change (n) VALUES (0);
CREATE TABLE lease (
    name TEXT PRIMARY KEY,
    holder TEXT NOT NULL,
    token BIGINT NOT NULL,
    until_s BIGINT NOT NULL
);
CREATE TABLE contract (
    stream TEXT NOT NULL,
    number BIGINT NOT NULL,
    sha256 TEXT NOT NULL,
    ddl TEXT NOT NULL,
    PRIMARY KEY (stream, number)
);
CREATE TABLE publication (
    instance TEXT NOT NULL,
    version BIGINT NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('reserved', 'packed', 'signed', 'done', 'abandoned')),
    epoch BIGINT NOT NULL,
    contract BIGINT NOT NULL,
    plan TEXT NOT NULL,
    packs TEXT NOT NULL,
    digests TEXT NOT NULL,
    created_s BIGINT NOT NULL,
    signed_s BIGINT,
    PRIMARY KEY (instance, version)
);
CREATE INDEX publication_unfinished ON publication (state) WHERE state IN ('reserved', 'packed', 'signed');
CREATE TABLE head (
    instance TEXT PRIMARY KEY,
    version BIGINT NOT NULL,
    epoch BIGINT NOT NULL,
    contract BIGINT NOT NULL,
    digests TEXT NOT NULL,
    packs TEXT NOT NULL,
    signed_s BIGINT NOT NULL
);
CREATE TABLE store (
    id TEXT PRIMARY KEY,
    zone TEXT,
    region TEXT,
    vanished_s BIGINT,
    serial BIGINT NOT NULL DEFAULT 0,
    serial_floor BIGINT NOT NULL DEFAULT 0,
    content_serial BIGINT NOT NULL DEFAULT 0,
    put_serial BIGINT NOT NULL DEFAULT 0,
    etag TEXT,
    epoch BIGINT NOT NULL DEFAULT 0,
    signer TEXT NOT NULL DEFAULT '',
    content TEXT,
    envelope TEXT,
    signed_s BIGINT,
    expires_s BIGINT
);
CREATE INDEX store_to_put ON store (id) WHERE put_serial < serial;
CREATE TABLE trust (
    version BIGINT PRIMARY KEY,
    envelope TEXT NOT NULL,
    created_s BIGINT NOT NULL,
    put BIGINT NOT NULL DEFAULT 0
);
CREATE TABLE device (
    id TEXT PRIMARY KEY,
    store TEXT NOT NULL,
    public_key TEXT NOT NULL,
    enrolled_s BIGINT NOT NULL,
    revoked_s BIGINT
);
CREATE INDEX device_store ON device (store);
CREATE TABLE beat (
    device TEXT PRIMARY KEY,
    seq BIGINT NOT NULL,
    envelope TEXT NOT NULL,
    received_s BIGINT NOT NULL,
    last_seen_s BIGINT NOT NULL
);
CREATE INDEX beat_received ON beat (received_s);
CREATE TABLE receipt (
    store TEXT NOT NULL,
    sha256 TEXT NOT NULL,
    time_s BIGINT NOT NULL,
    recorded_s BIGINT NOT NULL,
    envelope TEXT NOT NULL,
    PRIMARY KEY (store, sha256)
);
CREATE TABLE episode (
    key TEXT PRIMARY KEY,
    text TEXT NOT NULL,
    opened_s BIGINT NOT NULL,
    closed_s BIGINT
);
CREATE TABLE mail (
    n BIGINT PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    subject TEXT NOT NULL,
    body TEXT NOT NULL,
    created_s BIGINT NOT NULL,
    attempts BIGINT NOT NULL DEFAULT 0,
    next_s BIGINT NOT NULL,
    claimed_s BIGINT NOT NULL DEFAULT 0,
    own_fault BIGINT NOT NULL DEFAULT 0,
    sent_s BIGINT,
    last_error TEXT
);
CREATE INDEX mail_unsent ON mail (next_s) WHERE sent_s IS NULL;
CREATE TABLE mirror (url TEXT PRIMARY KEY, mark BIGINT NOT NULL, even BIGINT NOT NULL);
