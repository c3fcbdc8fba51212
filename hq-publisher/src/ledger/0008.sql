-- What a version requires of other streams: the instances' newest versions when it was signed.
ALTER TABLE head ADD COLUMN requires TEXT NOT NULL DEFAULT '{}';
