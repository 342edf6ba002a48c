"""Surgery on `bx.Params` in memory."""
