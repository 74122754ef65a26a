// Command pod is a workload in a pod: it has its X.509-SVID from the agent of its node
// through go-spiffe, serves mutual TLS with it, and asks the other pods of its service
// for theirs again and again, over a new connection each. It answers "does identity
// work here, and did it ever not", on a plain HTTP port, as JSON.
//
//	pod SOCKET SERVICE
//
// SERVICE is where the others are, as host:port.
package main

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

// Ports of the pod.
const (
	meshPort   = ":8443"
	reportPort = ":8080"
)

// report is what the pod tells the test.
type report struct {
	ID string `json:"id"`
	// Waited is how long the first X.509-SVID took, from the connection to the socket.
	Waited time.Duration `json:"waited"`
	// Life of the present X.509-SVID.
	Life    time.Duration `json:"life"`
	OK      int           `json:"ok"`
	Failed  int           `json:"failed"`
	Problem string        `json:"problem"` // of the last that failed
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil && ctx.Err() == nil {
		fmt.Fprintln(os.Stderr, "pod:", err)
		os.Exit(1) //nolint:forbidigo,gocritic // this is main
	}
}

func run(ctx context.Context, args []string) error {
	if len(args) != 2 {
		return errors.New("usage: pod SOCKET SERVICE")
	}
	p := &pod{service: args[1]}
	begin := time.Now()
	source, err := workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(workloadapi.WithAddr("unix://"+args[0])))
	if err != nil {
		return err
	}
	defer source.Close() //nolint:errcheck // the program ends
	p.source, p.waited = source, time.Since(begin)
	server := &http.Server{
		Addr: meshPort, ReadHeaderTimeout: time.Minute, Handler: http.HandlerFunc(p.answer),
		TLSConfig: tlsconfig.MTLSServerConfig(source, source, tlsconfig.AuthorizeAny()), // of the trust domain: its bundle verifies
	}
	reports := &http.Server{Addr: reportPort, ReadHeaderTimeout: time.Minute, Handler: http.HandlerFunc(p.report)}
	failed := make(chan error, 2)
	go func() { failed <- server.ListenAndServeTLS("", "") }()
	go func() { failed <- reports.ListenAndServe() }()
	go p.ask(ctx)
	select {
	case err = <-failed:
	case <-ctx.Done():
	}
	return errors.Join(err, server.Close(), reports.Close())
}

type pod struct {
	service string
	source  *workloadapi.X509Source
	waited  time.Duration

	mu         sync.Mutex // guards what follows
	ok, failed int
	problem    string
}

// answer says nothing: who asks has been verified by then.
func (p *pod) answer(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNoContent) }

// report answers the kubelet's probe and the test.
func (p *pod) report(w http.ResponseWriter, _ *http.Request) {
	svid, err := p.source.GetX509SVID()
	if err != nil {
		http.Error(w, err.Error(), http.StatusServiceUnavailable)
		return
	}
	leaf := svid.Certificates[0]
	p.mu.Lock()
	defer p.mu.Unlock()
	err = json.NewEncoder(w).Encode(report{
		ID: svid.ID.String(), Waited: p.waited, Life: leaf.NotAfter.Sub(leaf.NotBefore),
		OK: p.ok, Failed: p.failed, Problem: p.problem,
	})
	if err != nil {
		fmt.Fprintln(os.Stderr, "pod: report:", err)
	}
}

// ask asks another pod ten times a second.
func (p *pod) ask(ctx context.Context) {
	ticker := time.NewTicker(100 * time.Millisecond)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		err := p.handshake(ctx)
		// A service without a pod that is ready refuses connections: that is not ours.
		if op := (*net.OpError)(nil); errors.As(err, &op) && op.Op == "dial" {
			continue
		}
		p.mu.Lock()
		if p.ok++; err != nil {
			p.ok--
			p.failed++
			p.problem = err.Error()
		}
		p.mu.Unlock()
	}
}

// handshake is one request over a connection of its own.
func (p *pod) handshake(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", p.service)
	if err != nil {
		return err
	}
	defer conn.Close() //nolint:errcheck // it was read
	client := &http.Client{Transport: &http.Transport{
		DialTLSContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			secured := tls.Client(conn, tlsconfig.MTLSClientConfig(p.source, p.source, tlsconfig.AuthorizeAny()))
			return secured, secured.HandshakeContext(ctx)
		},
		DisableKeepAlives: true,
	}}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+p.service, nil)
	if err != nil {
		return err
	}
	answer, err := client.Do(request)
	if err != nil {
		return err
	}
	return answer.Body.Close()
}
