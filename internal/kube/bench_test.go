package kube

import (
	"encoding/json"
	"fmt"
	"runtime"
	"strings"
	"testing"
)

// realisticPod is an event of a pod as clusters have them, of some eight kilobytes: most
// of it is what is not kept.
func realisticPod(i int) []byte {
	hex := func(n int) string { return fmt.Sprintf("%064x", n) }
	uid := fmt.Sprintf("%08x-0000-4000-8000-%012x", i, i)
	app := i % 100
	var env, mounts, status []string
	for e := range 30 {
		env = append(env, fmt.Sprintf(`{"name":"SETTING_%d","valueFrom":{"configMapKeyRef":{"name":"settings","key":"setting-%d"}}}`, e, e))
	}
	for v := range 6 {
		mounts = append(mounts, fmt.Sprintf(`{"name":"volume-%d","mountPath":"/var/lib/volume-%d","readOnly":true}`, v, v))
	}
	for _, c := range []string{"app", "proxy"} {
		status = append(status, fmt.Sprintf(`{"name":%q,"state":{"running":{"startedAt":"2026-01-01T00:00:00Z"}},"ready":true,"restartCount":0,"image":"registry.example.org/team/%s-%d:1.2.3","imageID":"registry.example.org/team/%s-%d@sha256:%s","containerID":"containerd://%s","started":true}`, c, c, app, c, app, hex(app), hex(2*i)))
	}
	container := func(name string) string {
		return fmt.Sprintf(`{"name":%q,"image":"registry.example.org/team/%s-%d:1.2.3","env":[%s],"volumeMounts":[%s],"resources":{"limits":{"cpu":"1","memory":"1Gi"}},"imagePullPolicy":"IfNotPresent"}`,
			name, name, app, strings.Join(env, ","), strings.Join(mounts, ","))
	}
	return []byte(fmt.Sprintf(`{"type":"ADDED","object":{"apiVersion":"v1","kind":"Pod","metadata":{"name":"app-%d-5d4f8c7b9-%05x","namespace":"team-%d","uid":%q,"resourceVersion":"%d","creationTimestamp":"2026-01-01T00:00:00Z",
		"labels":{"app":"app-%d","app.kubernetes.io/name":"app-%d","app.kubernetes.io/instance":"app-%d-main","app.kubernetes.io/version":"1.2.3","app.kubernetes.io/managed-by":"Helm","pod-template-hash":"5d4f8c7b9","team":"team-%d","security.istio.io/tlsMode":"istio"},
		"annotations":{"sidecar.istio.io/status":%q},
		"ownerReferences":[{"apiVersion":"apps/v1","kind":"ReplicaSet","name":"app-%d-5d4f8c7b9","uid":"%08x-1111-4000-8000-000000000000","controller":true,"blockOwnerDeletion":true}],
		"managedFields":[{"manager":"kube-controller-manager","operation":"Update","apiVersion":"v1","fieldsType":"FieldsV1","fieldsV1":{%s"f:metadata":{}}}]},
		"spec":{"nodeName":"node-%d","serviceAccountName":"app-%d","containers":[%s,%s]},
		"status":{"phase":"Running","podIP":"10.0.0.1","containerStatuses":[%s]}}}`,
		app, i, app%20, uid, i, app, app, app, app%20, strings.Repeat("x", 300), app, app,
		strings.Repeat(`"f:spec":{"f:containers":{"k:{\"name\":\"app\"}":{"f:env":{}}}},`, 10), i/30, app, container("app"), container("proxy"), strings.Join(status, ",")))
}

// BenchmarkPods is the way of pods from the wire into the index, and what they take
// there.
func BenchmarkPods(b *testing.B) {
	for _, pods := range []int{2_000, 100_000} {
		b.Run(fmt.Sprint(pods), func(b *testing.B) {
			b.SetBytes(int64(len(realisticPod(0))))
			heap := func() uint64 {
				var m runtime.MemStats
				runtime.GC()
				runtime.GC() // what the first one has finalized
				runtime.ReadMemStats(&m)
				return m.HeapAlloc
			}
			for b.Loop() {
				b.StopTimer()
				before := heap()
				p := newPods()
				reader := podReader{p}
				texts := make([][]byte, 500)
				for i := range pods {
					if i%len(texts) == 0 {
						for j := range texts {
							texts[j] = realisticPod(i + j)
						}
						b.StartTimer()
					}
					var e event[podObject, *podObject]
					if err := json.Unmarshal(texts[i%len(texts)], &e); err != nil {
						b.Fatal(err)
					}
					reader.Set(newPod(&e.Object.value))
					if i%len(texts) == len(texts)-1 {
						b.StopTimer()
					}
				}
				clear(texts)
				b.ReportMetric(float64(heap()-before)/float64(pods), "B/pod")
				runtime.KeepAlive(p)
				b.StartTimer()
			}
			b.ReportMetric(float64(b.Elapsed().Microseconds())/float64(b.N*pods), "µs/pod")
		})
	}
}
