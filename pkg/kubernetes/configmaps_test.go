package kubernetes

import (
	"runtime"
	"strings"
	"testing"
	"weak"

	"github.com/meshid/meshid/internal/kube"
	"github.com/meshid/meshid/test/fakes/kubeapi"
)

// Whoever has a namespace can write a megabyte into the ConfigMap that is kept there. None
// of it stays in memory.
func TestOthersDataIsNotKept(t *testing.T) {
	client, err := kube.Open(kube.Config{Name: "prod", Kubeconfig: kubeapi.New(t).Kubeconfig})
	if err != nil {
		t.Fatal(err)
	}
	all := NewConfigMaps(ConfigMapsConfig{
		Client: client, Name: "bundle", Key: "bundle.pem", Bundle: func() (string, uint64) { return "pem", 3 },
	})
	text := func(key string) weak.Pointer[configMap] {
		c := &configMap{Data: map[string]string{key: strings.Repeat("x", 1<<20)}}
		c.Metadata.Namespace, c.Metadata.Annotations = "shop", map[string]string{annotationSequence: "7"}
		all.written.Set(all.keep(c))
		return weak.Make(c)
	}
	for _, key := range []string{"bundle.pem", "other"} {
		large := text(key)
		runtime.GC()
		if large.Value() != nil {
			t.Errorf("what somebody wrote into %s is kept", key)
		}
	}
	if w := all.written.Get("shop"); w.namespace != "shop" || w.sequence != 7 || !w.owned || !w.labelled {
		t.Errorf("it keeps %+v", w)
	}
}
