"""Ways to damage the files that peel reads, each from a seeded source of chance."""
