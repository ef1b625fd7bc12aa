"""Which tile a kernel gets: the tables of the package, all there can be, and those that were tuned."""
