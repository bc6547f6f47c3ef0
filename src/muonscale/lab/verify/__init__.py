"""The numbers of a layout against those of one process: `muonscale verify`."""
