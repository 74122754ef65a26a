package cli

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
)

// Ready tells systemd that the program serves now, if systemd has started it and wants
// to know (sd_notify(3)): what is ordered behind a unit with Type=notify waits for it.
func Ready(ctx context.Context) error {
	address := os.Getenv("NOTIFY_SOCKET")
	if address == "" {
		return nil
	}
	// "@" stands for an abstract one, as in net.
	c, err := (&net.Dialer{}).DialContext(ctx, "unixgram", address)
	if err != nil {
		return fmt.Errorf("tell systemd: %w", err)
	}
	_, err = c.Write([]byte("READY=1"))
	if err = errors.Join(err, c.Close()); err != nil {
		return fmt.Errorf("tell systemd: %w", err)
	}
	return nil
}
