"""What every process needs: errors, configuration, the gRPC server and channels, logging, telemetry."""
