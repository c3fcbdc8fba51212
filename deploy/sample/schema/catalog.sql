-- What an item is. Lengths are in characters.
CREATE TABLE item (
    sku TEXT PRIMARY KEY CHECK (length(sku) <= 20),
    barcode TEXT NOT NULL CHECK (length(barcode) <= 14),
    name TEXT NOT NULL CHECK (length(name) BETWEEN 1 AND 100),
    department TEXT NOT NULL CHECK (length(department) <= 40),
    vat INTEGER NOT NULL CHECK (vat BETWEEN 0 AND 100)
) STRICT;
CREATE INDEX item_barcode ON item (barcode);
