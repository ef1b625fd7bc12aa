"""What only torch needs: the guard in front of the plans."""
