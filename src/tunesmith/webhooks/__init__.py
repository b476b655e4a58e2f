"""Signed HTTP requests that tell other systems what happened: settings, signatures, deliveries that wait, sending."""
