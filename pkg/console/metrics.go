package console

import "github.com/prometheus/client_golang/prometheus"

type metrics struct {
	logins   *prometheus.CounterVec
	requests *prometheus.CounterVec
	streams  prometheus.Gauge
}

// newMetrics registers the console's metrics. Every series exists from the start.
func newMetrics(reg prometheus.Registerer, c *Console) (*metrics, error) {
	m := &metrics{
		logins: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "meshid_ca_console_logins_total", Help: "Attempts to sign in to the console.",
		}, []string{"method", "outcome"}),
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "meshid_ca_console_pages_total", Help: "Pages of the console that were asked for.",
		}, []string{"outcome"}),
		streams: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "meshid_ca_console_streams", Help: "Browsers that wait for news of the console.",
		}),
	}
	for _, method := range []string{methodLink, methodOIDC, methodMTLS} {
		for _, outcome := range []string{"success", "refused"} {
			m.logins.WithLabelValues(method, outcome)
		}
	}
	for _, outcome := range []string{"success", "refused", "error"} {
		m.requests.WithLabelValues(outcome)
	}
	sessions := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "meshid_ca_console_sessions", Help: "Sessions of the console, those that have ended aside.",
	}, func() float64 { return float64(c.sessions.count()) })
	for _, collector := range []prometheus.Collector{m.logins, m.requests, m.streams, sessions} {
		if err := reg.Register(collector); err != nil {
			return nil, err
		}
	}
	return m, nil
}

func (m *metrics) login(method string, ok bool) {
	outcome := "refused"
	if ok {
		outcome = "success"
	}
	m.logins.WithLabelValues(method, outcome).Inc()
}
