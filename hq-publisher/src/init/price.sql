-- The contract of the stream `price`: what its rows are, at headquarters and on every register.
-- STRICT tables with a primary key; CHECKs say what a value may be. A longer text than length() allows
-- is refused at headquarters, with the row named.
CREATE TABLE price (
    sku         TEXT NOT NULL PRIMARY KEY CHECK (length(sku) <= 20),
    price_cents INTEGER NOT NULL CHECK (price_cents BETWEEN 1 AND 100000000),
    updated     TEXT CHECK (length(updated) <= 30)
) STRICT;
