-- Rises when a device is enrolled or revoked: who remembers devices knows by it whether they are these still.
ALTER TABLE change ADD COLUMN devices BIGINT NOT NULL DEFAULT 0;
