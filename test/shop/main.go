// Command shop is all the programs of a small shop in one static binary. It
// answers plain HTTP on the loopback interface and calls its upstream in plain
// HTTP through the sidecar beside it: it knows nothing of TLS, certificates or
// SPIFFE, except that the sidecar tells it who called (the header
// X-Forwarded-Client-Cert), which it passes on in its answer.
//
//	shop serve              a service: web, orders, stock
//	shop buy                a customer: sends requests and counts what comes back
//	shop intrude ADDRESS... somebody who tries the doors of the services
package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"syscall"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	logger := slog.New(slog.NewTextHandler(os.Stderr, nil))
	if err := run(ctx, os.Args[1:], logger); err != nil {
		logger.Error("shop ended", "err", err)
		os.Exit(1) //nolint:forbidigo // this is main
	}
}

func run(ctx context.Context, args []string, logger *slog.Logger) error {
	if len(args) == 0 {
		return errors.New("no role: serve, buy or intrude")
	}
	service := os.Getenv("SHOP_SERVICE")
	switch args[0] {
	case "serve":
		return serve(ctx, service, os.Getenv("SHOP_INSTANCE"), os.Getenv("SHOP_UPSTREAM"), os.Getenv("SHOP_STATS"))
	case "buy":
		c := newCustomer(os.Getenv("SHOP_UPSTREAM"), os.Getenv("SHOP_EXPECT"))
		return c.run(ctx, os.Getenv("SHOP_RATE"), os.Getenv("SHOP_STATS"), logger)
	case "intrude":
		return intrude(ctx, os.Getenv("SHOP_UPSTREAM"), os.Getenv("SHOP_CLAIM"), os.Getenv("SHOP_STATS"), args[1:], logger)
	default:
		return fmt.Errorf("unknown role %q: serve, buy or intrude", args[0])
	}
}
