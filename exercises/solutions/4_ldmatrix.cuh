    return row * ROW_BYTES + (chunk ^ row % 8) * 16;
