"""What crosses the wire between a hospital and the coordinator. No Flower here."""
