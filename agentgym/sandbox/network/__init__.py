"""The one way out of a box: an allow-list of hosts, kept by a proxy on the host."""
