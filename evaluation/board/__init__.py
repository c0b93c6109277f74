"""From records to tables and the page. No torch."""
