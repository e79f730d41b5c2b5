"""A client of routers: one session to each, requests on any."""
