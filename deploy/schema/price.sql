-- The contract of the stream `price`: what its rows are, at headquarters and on every register. STRICT tables with a primary key;
-- CHECKs say what a value may be. A row that breaks one stops at headquarters, with its key, column and limit named.
CREATE TABLE price (
    sku         TEXT PRIMARY KEY CHECK (length(sku) <= 20),                     -- TEXT: an INTEGER would lose leading zeros
    price_cents INTEGER NOT NULL CHECK (price_cents BETWEEN 1 AND 100000000),   -- whole cents: a REAL would not be exact
    updated     TEXT CHECK (length(updated) <= 30)                              -- may be NULL
) STRICT;
-- A new table, a new last column with a default and a new index travel inside a delta; other changes need --allow-rebuild.
