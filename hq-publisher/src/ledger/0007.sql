-- Who has a mail already, where others are still to get it; how often it was said “not now” to it; the same of the second way.
ALTER TABLE mail ADD COLUMN taken TEXT NOT NULL DEFAULT '{}';
ALTER TABLE mail ADD COLUMN refused BIGINT NOT NULL DEFAULT 0;
ALTER TABLE mail ADD COLUMN told_tries BIGINT NOT NULL DEFAULT 0;
ALTER TABLE mail ADD COLUMN told_refused BIGINT NOT NULL DEFAULT 0;
ALTER TABLE mail ADD COLUMN told_next_s BIGINT NOT NULL DEFAULT 0;
ALTER TABLE mail ADD COLUMN told_fault BIGINT NOT NULL DEFAULT 0;
