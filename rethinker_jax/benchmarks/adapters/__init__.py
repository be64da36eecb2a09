"""One module per family of benchmarks: a published row → items. Rows are untrusted; bad ones raise BadField."""
