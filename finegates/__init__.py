"""finegates: learn row and column gates on frozen Linears, remove what closes, run the rest faster."""
