-- Rises when a device is enrolled or revoked, which notes the number: who remembers devices knows by them whose are these no more.
ALTER TABLE change ADD COLUMN devices BIGINT NOT NULL DEFAULT 0;
ALTER TABLE device ADD COLUMN changed BIGINT NOT NULL DEFAULT 0;
CREATE INDEX device_changed ON device (changed);
