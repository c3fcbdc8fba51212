CREATE INDEX store_serials ON store (id, serial, content_serial, put_serial);
CREATE INDEX store_expires ON store (expires_s, vanished_s, id);
CREATE INDEX episode_open ON episode (key) WHERE closed_s IS NULL;
