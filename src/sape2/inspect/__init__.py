"""One image under a trained model: `look` passes it through once, and `explain`, `explore` and `pictures` show that record."""
