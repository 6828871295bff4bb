"""The one maker of pages and pictures: a page maker elsewhere holds its own template and values only."""
