package mesh

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"regexp"
	"strings"
	"time"
)

// adminTimeout bounds one question to a process of the shop.
const adminTimeout = 5 * time.Second

// unixClient speaks HTTP over one Unix socket.
func unixClient(socket string) *http.Client {
	return &http.Client{Timeout: adminTimeout, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", socket)
		},
	}}
}

// get asks over a Unix socket and decodes the JSON answer into out.
func get(ctx context.Context, client *http.Client, path string, out any) error {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://local"+path, nil)
	if err != nil {
		return err
	}
	res, err := client.Do(r)
	if err != nil {
		return err
	}
	defer func() { _ = res.Body.Close() }()
	body, err := io.ReadAll(io.LimitReader(res.Body, 16<<20))
	if err != nil {
		return err
	}
	if res.StatusCode != http.StatusOK {
		return fmt.Errorf("GET %s: %s: %s", path, res.Status, strings.TrimSpace(string(body)))
	}
	return json.Unmarshal(body, out)
}

// Envoy is the admin interface of one sidecar.
type Envoy struct{ client *http.Client }

// Get asks the admin interface for a path and decodes its JSON.
func (e Envoy) Get(ctx context.Context, path string, out any) error {
	return get(ctx, e.client, path, out)
}

// Stats returns the counters and gauges whose names match a regular expression.
func (e Envoy) Stats(ctx context.Context, filter string) (map[string]uint64, error) {
	var answer struct {
		Stats []struct {
			Name  string `json:"name"`
			Value any    `json:"value"` // a number, or a text
		} `json:"stats"`
	}
	if err := get(ctx, e.client, "/stats?format=json&filter="+url.QueryEscape(filter), &answer); err != nil {
		return nil, fmt.Errorf("envoy's stats: %w", err)
	}
	stats := make(map[string]uint64, len(answer.Stats))
	for _, s := range answer.Stats {
		if n, ok := s.Value.(float64); ok && n >= 0 {
			stats[s.Name] = uint64(n)
		}
	}
	return stats, nil
}

// Ready returns nil once the sidecar has its certificate and listens.
func (e Envoy) Ready(ctx context.Context) error {
	c, err := e.Certificate(ctx)
	if err != nil {
		return err
	}
	if c == nil {
		return errors.New("no certificate yet")
	}
	stats, err := e.Stats(ctx, `^listener_manager\.workers_started$`)
	if err == nil && stats["listener_manager.workers_started"] != 1 {
		err = errors.New("it does not listen yet")
	}
	return err
}

// Certificate is a certificate that a sidecar serves.
type Certificate struct {
	ID       string
	Serial   string
	NotAfter time.Time
}

// Certificate returns the leaf that the sidecar serves now, or nil if it has
// none yet.
func (e Envoy) Certificate(ctx context.Context) (*Certificate, error) {
	var answer struct {
		Certificates []struct {
			Chain []struct {
				Serial   string    `json:"serial_number"`
				NotAfter time.Time `json:"expiration_time"`
				Names    []struct {
					URI string `json:"uri"`
				} `json:"subject_alt_names"`
			} `json:"cert_chain"`
		} `json:"certificates"`
	}
	if err := get(ctx, e.client, "/certs", &answer); err != nil {
		return nil, fmt.Errorf("envoy's certificates: %w", err)
	}
	var last *Certificate
	for _, c := range answer.Certificates {
		if len(c.Chain) == 0 || len(c.Chain[0].Names) == 0 {
			continue
		}
		leaf := &Certificate{ID: c.Chain[0].Names[0].URI, Serial: c.Chain[0].Serial, NotAfter: c.Chain[0].NotAfter}
		if last == nil || leaf.NotAfter.After(last.NotAfter) {
			last = leaf
		}
	}
	return last, nil
}

// Traffic is what one sidecar, or many, have counted.
type Traffic struct {
	// Handshakes are TLS handshakes that succeeded as a server.
	Handshakes uint64
	// Refused are TLS connections that were refused as a server.
	Refused uint64
	// Rotations are leaves that were taken into use in the place of another.
	Rotations uint64
	// Rejected are secrets that Envoy has refused (NACK).
	Rejected uint64
}

func (t Traffic) plus(o Traffic) Traffic {
	return Traffic{
		Handshakes: t.Handshakes + o.Handshakes, Refused: t.Refused + o.Refused,
		Rotations: t.Rotations + o.Rotations, Rejected: t.Rejected + o.Rejected,
	}
}

var (
	handshakeStat = regexp.MustCompile(`^listener\..*\.ssl\.handshake$`)
	refusedStat   = regexp.MustCompile(`^listener\..*\.ssl\.(connection_error|fail_verify_error|fail_verify_no_cert|fail_verify_san)$`)
	updateStat    = regexp.MustCompile(`sds\.default\.update_success$`)
	rejectedStat  = regexp.MustCompile(`sds\..*\.update_rejected$`)
)

// Traffic returns what the sidecar has counted since its start.
func (e Envoy) Traffic(ctx context.Context) (Traffic, error) {
	stats, err := e.Stats(ctx, `\.ssl\.|sds\.`)
	if err != nil {
		return Traffic{}, err
	}
	var t Traffic
	for name, n := range stats {
		switch {
		case handshakeStat.MatchString(name):
			t.Handshakes += n
		case refusedStat.MatchString(name):
			t.Refused += n
		case updateStat.MatchString(name):
			t.Rotations += n - min(n, 1)
		case rejectedStat.MatchString(name):
			t.Rejected += n
		}
	}
	return t, nil
}
