-- What an item costs in a zone, in cents.
CREATE TABLE price (
    sku TEXT PRIMARY KEY CHECK (length(sku) <= 20),
    cents INTEGER NOT NULL CHECK (cents BETWEEN 1 AND 10000000),
    updated TEXT NOT NULL CHECK (length(updated) <= 30)
) STRICT;
