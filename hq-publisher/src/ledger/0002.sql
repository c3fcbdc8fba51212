CREATE TABLE complaint (
    device TEXT NOT NULL,
    instance TEXT NOT NULL,
    code TEXT NOT NULL,
    since_s BIGINT NOT NULL,
    object TEXT,
    text TEXT NOT NULL,
    judged BIGINT NOT NULL DEFAULT 0,
    PRIMARY KEY (device, instance, code)
);
CREATE INDEX complaint_unjudged ON complaint (device) WHERE judged = 0;
