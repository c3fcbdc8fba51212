CREATE TABLE complaint (
    instance TEXT PRIMARY KEY,
    since_s BIGINT NOT NULL,
    who TEXT NOT NULL
);
