package main

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// workers bounds how many requests are open at once.
const workers = 8

// customer sends requests at a steady rate and checks each answer: every
// service on the way must have been called by exactly the identity expected.
type customer struct {
	client   *http.Client
	upstream string
	expect   []string // "service caller", outermost first

	requests, failures atomic.Uint64

	mu        sync.Mutex // guards what follows
	lastError string
	instances map[string]uint64 // answers by the instance that gave them
}

func newCustomer(upstream, expect string) *customer {
	c := &customer{client: newClient(), upstream: upstream, instances: make(map[string]uint64)}
	if expect != "" {
		c.expect = strings.Split(expect, ",")
	}
	return c
}

func (c *customer) run(ctx context.Context, rate, stats string, logger *slog.Logger) error {
	perSecond, err := strconv.Atoi(rate)
	if err != nil || perSecond < 1 || perSecond > 10000 {
		return fmt.Errorf("SHOP_RATE is %q: want requests per second, 1 to 10000", rate)
	}
	l, err := listenUnix(ctx, stats)
	if err != nil {
		return err
	}
	// Nothing is counted before the first answer: the sidecars wait for their
	// first certificates, which is no failure.
	if !c.awaitFirst(ctx) {
		return nil
	}
	logger.InfoContext(ctx, "shop is open", "upstream", c.upstream)
	var wg sync.WaitGroup
	turns := make(chan struct{})
	for range workers {
		wg.Go(func() {
			for range turns {
				c.buy(ctx)
			}
		})
	}
	wg.Go(func() {
		defer close(turns)
		tick := time.NewTicker(time.Second / time.Duration(perSecond))
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
			select {
			case <-ctx.Done():
				return
			case turns <- struct{}{}:
			}
		}
	})
	err = serveUntil(ctx, l, http.HandlerFunc(c.report))
	wg.Wait()
	return err
}

func (c *customer) awaitFirst(ctx context.Context) bool {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		if a, err := ask(ctx, c.client, c.upstream); err == nil && c.check(a) == nil {
			return true
		}
		select {
		case <-ctx.Done():
			return false
		case <-tick.C:
		}
	}
}

func (c *customer) buy(ctx context.Context) {
	// A request that was begun is finished, so that the end is no failure.
	a, err := ask(context.WithoutCancel(ctx), c.client, c.upstream)
	if err == nil {
		err = c.check(a)
	}
	c.requests.Add(1)
	c.mu.Lock()
	defer c.mu.Unlock()
	if err != nil {
		c.failures.Add(1)
		c.lastError = time.Now().UTC().Format(time.TimeOnly) + " " + err.Error()
		return
	}
	for ; a != nil; a = a.Upstream {
		c.instances[a.Instance]++
	}
}

func (c *customer) check(a *answer) error {
	for _, want := range c.expect {
		if a == nil {
			return fmt.Errorf("no answer from a service: want %s", want)
		}
		if got := a.Service + " " + a.Caller; got != want {
			return fmt.Errorf("service and its caller: got %s, want %s", got, want)
		}
		a = a.Upstream
	}
	return nil
}

func (c *customer) report(w http.ResponseWriter, _ *http.Request) {
	c.mu.Lock()
	defer c.mu.Unlock()
	_ = json.NewEncoder(w).Encode(map[string]any{ // the caller is gone if it fails
		"requests": c.requests.Load(), "failures": c.failures.Load(),
		"last_error": c.lastError, "instances": c.instances,
	})
}

func listenUnix(ctx context.Context, path string) (net.Listener, error) {
	if err := os.Remove(path); err != nil && !os.IsNotExist(err) { //nolint:gosec // the path is the harness's
		return nil, err
	}
	var l net.ListenConfig
	return l.Listen(ctx, "unix", path)
}
