-- Percent off, between two days.
CREATE TABLE promo (
    id INTEGER PRIMARY KEY,
    sku TEXT NOT NULL CHECK (length(sku) <= 20),
    percent INTEGER NOT NULL CHECK (percent BETWEEN 1 AND 99),
    starts TEXT NOT NULL CHECK (length(starts) = 10),
    ends TEXT NOT NULL CHECK (length(ends) = 10)
) STRICT;
CREATE INDEX promo_sku ON promo (sku);
