-- Serials under which nothing was signed here, of which a device told: both ends are not of them.
ALTER TABLE store ADD COLUMN passed_from BIGINT NOT NULL DEFAULT 0;
ALTER TABLE store ADD COLUMN passed_to BIGINT NOT NULL DEFAULT 0;
