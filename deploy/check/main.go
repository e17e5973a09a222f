// Command check tells whether every field of manifests is one that the Kubernetes API they name has.
//
// It reads each document of each file named on its command line into Kubernetes' own Go type of the
// document's apiVersion and kind, and refuses what that type does not have: a field unknown or
// written in other capitals, one given twice, a value of another type. It asks no cluster, so it
// knows nothing of what only a server judges, such as fields that are required.
//
// For each document it prints one line of JSON, {"file": ..., "document": ...}; what is wrong
// goes to standard error, and the exit code is 1 then.
package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"

	apps "k8s.io/api/apps/v1"
	core "k8s.io/api/core/v1"
	policy "k8s.io/api/policy/v1"
	rbac "k8s.io/api/rbac/v1"
	storage "k8s.io/api/storage/v1"
	"k8s.io/apimachinery/pkg/util/yaml"
	strictjson "sigs.k8s.io/json"
	strictyaml "sigs.k8s.io/yaml"
)

// kustomization has the few fields that ours use; its own types would bring a dozen modules along.
type kustomization struct {
	APIVersion string   `json:"apiVersion"`
	Kind       string   `json:"kind"`
	Resources  []string `json:"resources"`
	Images     []struct {
		Name    string `json:"name"`
		NewName string `json:"newName"`
		NewTag  string `json:"newTag"`
	} `json:"images"`
	Patches []struct {
		Path string `json:"path"`
	} `json:"patches"`
}

// types are those that our manifests use, by apiVersion and kind.
var types = map[string]func() any{
	"apps/v1 DaemonSet":             func() any { return new(apps.DaemonSet) },
	"apps/v1 Deployment":            func() any { return new(apps.Deployment) },
	"apps/v1 StatefulSet":           func() any { return new(apps.StatefulSet) },
	"policy/v1 PodDisruptionBudget": func() any { return new(policy.PodDisruptionBudget) },
	"v1 ConfigMap":                  func() any { return new(core.ConfigMap) },
	"v1 Namespace":                  func() any { return new(core.Namespace) },
	"v1 PersistentVolumeClaim":      func() any { return new(core.PersistentVolumeClaim) },
	"v1 Pod":                        func() any { return new(core.Pod) },
	"v1 Secret":                     func() any { return new(core.Secret) },
	"v1 Service":                    func() any { return new(core.Service) },
	"v1 ServiceAccount":             func() any { return new(core.ServiceAccount) },
	"storage.k8s.io/v1 CSIDriver":   func() any { return new(storage.CSIDriver) },
	"storage.k8s.io/v1 StorageClass": func() any {
		return new(storage.StorageClass)
	},
	"rbac.authorization.k8s.io/v1 ClusterRole":        func() any { return new(rbac.ClusterRole) },
	"rbac.authorization.k8s.io/v1 ClusterRoleBinding": func() any { return new(rbac.ClusterRoleBinding) },
	"rbac.authorization.k8s.io/v1 Role":               func() any { return new(rbac.Role) },
	"rbac.authorization.k8s.io/v1 RoleBinding":        func() any { return new(rbac.RoleBinding) },
	"kustomize.config.k8s.io/v1beta1 Kustomization":   func() any { return new(kustomization) },
}

func main() {
	good := len(os.Args) > 1
	for _, file := range os.Args[1:] {
		good = checkFile(file) && good
	}
	if !good {
		os.Exit(1)
	}
}

func checkFile(file string) bool {
	text, err := os.ReadFile(file)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return false
	}
	good, documents := true, 0
	reader := yaml.NewYAMLReader(bufio.NewReader(bytes.NewReader(text)))
	for {
		document, err := reader.Read()
		if errors.Is(err, io.EOF) {
			break
		}
		if err == nil {
			documents++
			err = check(file, document)
		}
		if err != nil {
			fmt.Fprintf(os.Stderr, "%s, document %d: %v\n", file, documents, err)
			good = false
			break
		}
	}
	if documents == 0 {
		fmt.Fprintf(os.Stderr, "%s has no document\n", file)
		return false
	}
	return good
}

func check(file string, document []byte) error {
	text, err := strictyaml.YAMLToJSONStrict(document)
	if err != nil {
		return err
	}
	var anything any
	if err := json.Unmarshal(text, &anything); err != nil {
		return err
	}
	line, err := json.Marshal(map[string]any{"file": file, "document": anything})
	if err != nil {
		return err
	}
	fmt.Println(string(line))
	// Of patches: kustomize's word, not a field.
	withoutPatchWords(anything)
	if text, err = json.Marshal(anything); err != nil {
		return err
	}
	var named struct{ APIVersion, Kind string }
	if err := json.Unmarshal(text, &named); err != nil {
		return err
	}
	make, known := types[named.APIVersion+" "+named.Kind]
	if !known {
		return fmt.Errorf("apiVersion %q, kind %q: add its type to deploy/check/main.go", named.APIVersion, named.Kind)
	}
	problems, err := strictjson.UnmarshalStrict(text, make())
	return errors.Join(append(problems, err)...)
}

func withoutPatchWords(value any) {
	switch value := value.(type) {
	case map[string]any:
		delete(value, "$patch")
		for _, inner := range value {
			withoutPatchWords(inner)
		}
	case []any:
		for _, inner := range value {
			withoutPatchWords(inner)
		}
	}
}
