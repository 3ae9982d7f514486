"""Values: errors, byte units, config, ledger, layout, ticket, blocks. Nothing here does I/O or owns memory."""
