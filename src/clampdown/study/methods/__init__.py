"""Methods that propose plans: one file each, and the table that names them."""
